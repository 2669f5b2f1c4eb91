"""`python -m eloquent` is the command `eloquent`."""

from eloquent.cli import main

if __name__ == "__main__":
    main()
