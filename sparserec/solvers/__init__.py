"""One file per algorithm; the functions are re-exported by the package itself."""
