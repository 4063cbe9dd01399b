"""Raw clips to latent columns: plan, decode, encode, write. Never imports train."""
