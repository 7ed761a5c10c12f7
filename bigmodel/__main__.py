"""``python -m bigmodel`` is the ``bigmodel`` command."""

from bigmodel.cli import main

if __name__ == "__main__":
    main()
