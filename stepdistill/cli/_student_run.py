"""One run of a comparison, as `compare` starts it: OUT STUDENT SEED."""

import sys

from stepdistill.cli.compare import setups
from stepdistill.comparison.student_run import main

if __name__ == "__main__":
    main(sys.argv[1:], setups())
