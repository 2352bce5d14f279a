"""`python -m tokentune COMMAND`, the same as the console command `tokentune COMMAND`."""

from tokentune.cli.main import main

if __name__ == "__main__":
    main()
