"""Studies: several ways to get sizes, on several seeds, compared by the tokens they take."""
