"""As upstream's package of arguments is called."""
