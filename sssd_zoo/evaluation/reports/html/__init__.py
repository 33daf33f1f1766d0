"""report.html: a run on one page that needs no network, with its clusters to look at, to name and to merge."""
