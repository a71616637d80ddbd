"""The command line: arguments to settings, settings to a run. torch is imported only by the commands that compute."""
