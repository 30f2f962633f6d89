"""The local cloud: stand-ins for the exchange, CoinGecko, Telegram and AWS, on loopback, so that nobody needs an account.

``server.Sandbox`` starts it inside a process, ``python -m crpbot_lib.sandbox serve`` as one of its own. Launched instances run
their user data as real processes (``instances``, ``guest``). Production code meets it only through endpoints in configuration;
nothing imports it but tests, the demonstration and its command line. Needs Linux and bash.

This package imports nothing by itself: the stand-ins on an instance's PATH start in tens of milliseconds.
"""
