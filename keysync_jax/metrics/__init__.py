"""How good a dub is, as numbers; each measure says its unit and which way is better."""
