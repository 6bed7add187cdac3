"`python -m delta_llava` is the program `delta-llava`."

from .cli import main

if __name__ == "__main__":
    main()
