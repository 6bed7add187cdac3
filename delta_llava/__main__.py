"`python -m delta_llava` is the program `delta-llava`."

from .cli import main

main()
