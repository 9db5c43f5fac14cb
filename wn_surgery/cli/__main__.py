"""``python -m wn_surgery.cli``, where the script is not on the path."""

from wn_surgery.cli import main

main()
