// The grey values that are shown: level (the middle) and width.

const STEPS = 400;
const element = (id) => document.getElementById(id);

/** Bring the sliders to the image that is shown. */
export function showWindow(viewer) {
  const [low, high] = viewer.range;
  const step = (high - low) / STEPS || 1;
  for (const [id, min, max] of [["level", low, high], ["width", step, high - low || 1]]) {
    Object.assign(element(id), { min, max, step: "any" });
  }
  write(...viewer.automatic); // NiiVue shows a new image with its automatic window
}

/** Let the sliders set the window, at most once per picture. */
export function followWindow(viewer) {
  let waiting = false;
  const follow = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const [level, width] = ["level", "width"].map((id) => Number(element(id).value));
      set(viewer, level - width / 2, level + width / 2);
    });
  };
  element("level").oninput = element("width").oninput = follow;
  element("automatic-window").onclick = () => set(viewer, ...viewer.automatic);
}

function set(viewer, black, white) {
  write(black, white);
  viewer.setWindow(black, white);
}

function write(black, white) {
  for (const [id, value] of [["level", (black + white) / 2], ["width", white - black]]) {
    element(id).value = value;
    element(`${id}-value`).textContent = +value.toPrecision(4);
  }
}
