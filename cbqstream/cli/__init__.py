"""The command line, which makes settings from arguments and runs commands. Only commands that compute import torch."""
