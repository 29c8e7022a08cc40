"""Device back ends, and the tables that name them."""
