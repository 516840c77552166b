// The keyboard. Text fields keep their keys.

/** Call `actions[key]` for a key, `actions["ctrl+" + key]` with Ctrl or Cmd. */
export function followKeys(actions) {
  window.addEventListener("keydown", (event) => {
    const typing = event.target.matches('input[type="search"], select') || document.querySelector("dialog[open]");
    const name = (event.ctrlKey || event.metaKey ? "ctrl+" : "") + event.key.toLowerCase();
    if ((typing && !name.startsWith("ctrl+")) || event.altKey || !(name in actions)) return;
    event.preventDefault();
    actions[name](event);
  });
}
