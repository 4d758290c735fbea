"""Other libraries' plug-in points, one file a library. Each needs its library; nothing here is imported without asking."""
