"""Another name of compare.py, from before it had this one."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("compare", prog="eval/report.py")
