"""Example applications for Flask-CommonDB. They are run from a checkout and never installed."""
