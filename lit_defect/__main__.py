"""`python -m lit_defect`."""

from lit_defect.cli import main

if __name__ == "__main__":
    main()
