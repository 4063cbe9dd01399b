"""Programs beside the product: data makers and scores."""
