"""`python -m stillhouse`: the command line where its script is not on the path."""

from stillhouse.commands.app import main

if __name__ == "__main__":
    main()
