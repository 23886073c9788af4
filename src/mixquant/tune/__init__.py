"""`mixquant tune`: the cheapest recipe that stays within a budget."""
