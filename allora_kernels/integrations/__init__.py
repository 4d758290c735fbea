"""Other libraries' plug-in points, a file or folder each. Each needs its library; nothing here is imported without asking."""
