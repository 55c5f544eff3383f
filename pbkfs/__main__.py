"""``python -m pbkfs`` is the command line."""

from pbkfs.cli.main import main

if __name__ == "__main__":
    main()
