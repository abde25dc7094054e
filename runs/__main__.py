"""``python -m runs`` is ``nas``."""

from runs.cli import main

if __name__ == "__main__":
    main()
