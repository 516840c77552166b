// Mouse, pen and finger on the image.

const LEFT = 0;
const MIDDLE = 1;
const RIGHT = 2;
const STEP = 0.5; // voxels between the points of a stroke

/**
 * Follow the pointer on a canvas, and call back with voxels.
 *
 * `actions`: tool() -> "point" or "scribble"; start(positive) -> whether drawing is allowed now;
 * point(voxel, positive); stroke(voxels, positive, finished); hover(voxel or null); scroll(slices).
 */
export function followPointer(canvas, viewer, actions) {
  let drawn = null; // {voxels, positive}
  let moved = null; // last place while the picture is moved
  let turned = 0; // of the wheel

  const voxelOf = (event) => (viewer.shape ? viewer.voxelAt(event.offsetX, event.offsetY) : null);

  canvas.addEventListener("contextmenu", (event) => event.preventDefault());

  canvas.addEventListener("pointerdown", (event) => {
    if (!viewer.shape || drawn) return;
    if (event.button === MIDDLE) {
      event.preventDefault();
      moved = [event.offsetX, event.offsetY];
      canvas.setPointerCapture(event.pointerId);
      return;
    }
    const voxel = voxelOf(event);
    const positive = event.button === LEFT;
    if (!voxel || (!positive && event.button !== RIGHT) || !actions.start(positive)) return;
    if (actions.tool() === "point") {
      actions.point(voxel, positive);
      return;
    }
    canvas.setPointerCapture(event.pointerId);
    drawn = { voxels: [voxel], positive };
    actions.stroke(drawn.voxels, positive, false);
  });

  canvas.addEventListener("pointermove", (event) => {
    actions.hover(voxelOf(event));
    if (moved) {
      viewer.pan(event.offsetX - moved[0], event.offsetY - moved[1]);
      moved = [event.offsetX, event.offsetY];
    } else if (drawn) {
      const voxel = voxelOf(event);
      const last = drawn.voxels.at(-1);
      if (!voxel || Math.hypot(...voxel.map((v, i) => v - last[i])) < STEP) return;
      drawn.voxels.push(voxel);
      actions.stroke(drawn.voxels, drawn.positive, false);
    }
  });

  const end = (event) => {
    moved = null;
    if (!drawn) return;
    const { voxels, positive } = drawn;
    drawn = null;
    actions.stroke(event.type === "pointerup" ? voxels : [], positive, true);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => actions.hover(null));

  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (!viewer.shape || drawn) return;
      if (event.ctrlKey) {
        viewer.zoom(Math.exp(-event.deltaY / 300));
        return;
      }
      turned += event.deltaMode ? Math.sign(event.deltaY) * 40 : event.deltaY;
      const slices = Math.trunc(turned / 40); // a notch of a mouse wheel is 100 or more
      if (!slices) return;
      turned = 0;
      actions.scroll(-Math.sign(slices));
    },
    { passive: false },
  );
}
