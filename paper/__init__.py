"""The paper's studies: its figures as grids of runs, the laptop studies, and what came of them."""
