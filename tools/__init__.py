"""Programs beside the product: data makers, benchmarks, scores."""
