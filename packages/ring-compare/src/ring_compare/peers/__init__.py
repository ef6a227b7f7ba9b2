"""Other libraries' rings, and yardsticks, as implementations to compare with."""
