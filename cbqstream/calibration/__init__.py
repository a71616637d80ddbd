"""Calibration data: text, chats or token ids are read and cut into segments of token ids."""
