"""``python -m halos_pl``: the same as the console script ``halos``."""

from halos_pl.cli.main import main

if __name__ == "__main__":
    main()
