"""The tests, one file per concept; test_all.py at the top gathers them."""
