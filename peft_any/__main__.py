"""``python -m peft_any``: the command line."""

from peft_any.cli import main

if __name__ == "__main__":
    main()
