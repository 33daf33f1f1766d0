"""Another name of compare.py, from before it had this one. The page of a single run is written by `sssd report`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("compare", prog="eval/report.py")
