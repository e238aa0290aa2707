"""What users hold: the loaded model, chats and answers. Imports any runtime room below it, never server or ros2."""
