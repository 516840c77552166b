// The lists at the sides: cases and classes.

import { css } from "./palette.js";

/** Fill the list of cases; `open` is called with a name. */
export function showCases({ cases, faults }, { current, filter, open }) {
  const entries = [
    ...cases.map(({ name, saved }) => ({ name, saved })),
    ...Object.entries(faults).map(([name, fault]) => ({ name, fault })),
  ];
  const wanted = entries.filter(({ name }) => name.toLowerCase().includes(filter.toLowerCase()));
  document.getElementById("case-count").textContent = cases.length;
  document.getElementById("cases").replaceChildren(
    ...wanted.map(({ name, saved, fault }) => {
      const button = document.createElement("button");
      button.append(span("name", name));
      if (saved) button.append(span("saved", "✓ saved"));
      if (fault) button.append(span("fault", "unusable"));
      button.title = fault ?? name;
      button.disabled = Boolean(fault);
      button.dataset.case = name;
      button.ariaCurrent = String(name === current);
      button.onclick = () => open(name);
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
}

/** Fill the list of classes ({name, value, colour}); `choose` is called with one. */
export function showClasses(classes, choose) {
  document.getElementById("classes").replaceChildren(
    ...classes.map((one, place) => {
      const button = document.createElement("button");
      button.setAttribute("role", "radio");
      button.dataset.label = one.name;
      button.style.setProperty("--swatch", css(one.colour));
      button.append(span("swatch", ""), span("name", one.name));
      if (place < 9) {
        const key = document.createElement("kbd");
        key.textContent = place + 1;
        button.append(key);
      }
      button.title = one.name;
      button.onclick = () => choose(one);
      return button;
    }),
  );
}

/** Mark one class as chosen. */
export function markClass(chosen) {
  for (const button of document.getElementById("classes").children) {
    button.ariaChecked = String(button.dataset.label === chosen.name);
  }
}

/** Mark the one button of a group whose data attribute has this value. */
export function press(group, attribute, value) {
  for (const button of document.getElementById(group).children) {
    button.ariaPressed = String(button.dataset[attribute] === String(value));
  }
}

function span(className, text) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = text;
  return element;
}
