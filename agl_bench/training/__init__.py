"""One model, one loop, one evaluation, for every selector. Receives objects, never names."""
