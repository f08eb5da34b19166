"""The one stack of every page and picture: numbers and pictures in, files out.

Measured -> Table, Strip, Chart -> Report. What is shown is said by the rooms that know it.
"""
