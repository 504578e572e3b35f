"""What `agl-bench new-plugin` writes: templates, and the names that go into them."""
