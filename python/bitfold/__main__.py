"""`python -m bitfold` is the command `bitfold`."""

from bitfold.cli import main

if __name__ == "__main__":
    main()
