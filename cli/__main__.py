"""`python -m d2.cli` is `d2`: what torchrun starts."""

from d2.cli.app import main

if __name__ == "__main__":
    main()
