"""`python -m sparserec` runs the demonstration."""

from sparserec import _demo

if __name__ == "__main__":
    raise SystemExit(_demo.main())
