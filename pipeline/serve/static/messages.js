// Telling and asking.

const SECONDS = 6;

/** Show a message; errors stay until they are closed. */
export function tell(text, kind = "info") {
  const box = document.createElement("div");
  box.className = `message ${kind}`;
  const words = document.createElement("span");
  words.textContent = text;
  const close = document.createElement("button");
  close.textContent = "✕";
  close.ariaLabel = "Close";
  close.onclick = () => box.remove();
  box.append(words, close);
  const list = document.getElementById("messages");
  for (const old of list.children) {
    if (old.firstChild.textContent === text) old.remove();
  }
  list.append(box);
  if (kind !== "error") setTimeout(() => box.remove(), SECONDS * 1000);
}

/** Close all messages. */
export function clearMessages() {
  document.getElementById("messages").replaceChildren();
}

/** Ask a question, and return whether it was answered with yes. */
export function ask(title, text, yes) {
  const dialog = document.getElementById("question");
  document.getElementById("question-title").textContent = title;
  document.getElementById("question-text").textContent = text;
  document.getElementById("question-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
