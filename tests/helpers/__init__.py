"""What several test files share: command lines, data, networks, and a server like the Hub's. Each file says which."""
