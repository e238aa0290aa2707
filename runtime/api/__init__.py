"""The user-facing API: loaded model, chats and answers. Imports any runtime package below it, never server or ros2."""
