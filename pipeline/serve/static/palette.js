// Colours of the classes: well apart from each other and from grey, also for most colour-blind eyes.

const COLOURS = [
  [76, 155, 232],
  [240, 180, 41],
  [87, 199, 133],
  [233, 108, 143],
  [166, 124, 240],
  [64, 200, 208],
  [240, 128, 72],
  [178, 204, 70],
  [214, 120, 214],
  [150, 160, 255],
];

/** Return [red, green, blue] of the class at a place in the list of classes. */
export function colourOf(place) {
  if (place < COLOURS.length) return COLOURS[place];
  // Beyond the list: turn by the golden angle, so that neighbours differ.
  const hue = ((place * 137.5) % 360) / 60;
  const channel = (shift) => {
    const k = (shift + hue) % 6;
    return Math.round(235 * (1 - 0.65 * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

/** Return a colour as CSS text. */
export function css([red, green, blue], alpha = 1) {
  return `rgb(${red} ${green} ${blue} / ${alpha})`;
}
