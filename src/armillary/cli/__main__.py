"""`python -m armillary.cli` is the command `armillary`."""

from armillary.__main__ import main

if __name__ == "__main__":
    main()
