"""`python -m sssd_zoo.cli`, where the `sssd` command is not on the path."""

from sssd_zoo.cli import main

main()
