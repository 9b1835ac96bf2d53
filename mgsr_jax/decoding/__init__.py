"""Generation over a static cache."""
