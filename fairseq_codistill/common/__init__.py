"""What several folders need and what belongs to none of them."""
