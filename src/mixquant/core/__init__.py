"""The rule and what it needs: the recipe, the phase of each row, and the rows of one layer."""
