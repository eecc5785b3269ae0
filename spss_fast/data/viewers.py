"""Files that open a scan and its label in 3D Slicer, at one voxel, and in ITK-SNAP, with that voxel marked.

Sources: the reading side of vtkMRMLSliceNode, vtkMRMLSliceCompositeNode and the storage nodes of 3D Slicer (a scene is
XML, an element per node, positions in mm of the RAS frame), and of WorkspaceAPI and ImageAnnotationData of ITK-SNAP (a
workspace is a registry: folders of entries). ITK-SNAP writes no cursor position into a workspace and reads none (its
own workspaces of 2015 to 2025 hold none): it opens every image at voxel n // 2 of each axis (IRISApplication), so that
the slice has to lie there. The workspace marks it by a landmark, visible in that slice alone, which the annotation
mode's "next annotation" goes to.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from spss_fast.data.geometry import Grid

# columns: the view's x axis, its y axis, and the way its slices run, in RAS; by the patient axis that this is along
VIEWS = {
    0: ("Yellow", "Sagittal", ((0, 0, -1), (-1, 0, 0), (0, 1, 0))),
    1: ("Green", "Coronal", ((-1, 0, 0), (0, 0, 1), (0, 1, 0))),
    2: ("Red", "Axial", ((-1, 0, 0), (0, 1, 0), (0, 0, 1))),
}
TO_RAS = np.diag([-1.0, -1.0, 1.0])  # from SimpleITK's LPS


def slicer_view(grid: Grid, axis: int) -> str:
    """The slice view of 3D Slicer that shows the slices along array axis ``axis``: like ``Red (axial)``."""
    colour, plane, _ = VIEWS[grid.patient_axes()[axis]]
    return f"{colour} ({plane.lower()})"


def slicer_scene(name: str, grid: Grid, voxel: tuple[int, int, int], image: str, label: str) -> bytes:
    """An MRML scene of the files ``image`` and ``label``, beside which it lies; all slice views meet at ``voxel``.

    The views lie in the planes of the scan, also where these are oblique to the patient.
    """
    root = ElementTree.Element("MRML", version="Slicer4.4.0", userTags="")
    directions = TO_RAS @ grid.axes
    along = grid.patient_axes()
    nearest = np.empty((3, 3))  # column p: the array axis along patient axis p, turned to point right, front or head
    for axis, patient in enumerate(along):
        nearest[:, patient] = directions[:, axis] * np.sign(directions[patient, axis])
    extent = float((np.array(grid.size) * grid.spacing).max())
    for patient, (colour, plane, standard) in VIEWS.items():
        rotation = nearest @ np.array(standard)
        to_ras = np.eye(4)
        to_ras[:3, :3], to_ras[:3, 3] = rotation, TO_RAS @ grid.point(voxel)
        thickness = grid.spacing[along.index(patient)]
        ElementTree.SubElement(
            root, "Slice", id=f"vtkMRMLSliceNode{colour}", name=colour, singletonTag=colour, layoutName=colour,
            layoutLabel=colour[0], fieldOfView=_numbers([extent, extent, thickness]), dimensions="256 256 1",
            sliceToRAS=_numbers(to_ras.ravel()), orientationReference=plane,
            orientation=plane if np.allclose(rotation, standard, atol=1e-6) else "Reformat",
        )
        ElementTree.SubElement(
            root, "SliceComposite", id=f"vtkMRMLSliceCompositeNode{colour}", name=f"SliceComposite{colour}",
            singletonTag=colour, layoutName=colour, labelOpacity="0.5", linkedControl="0",
            references="backgroundVolume:vtkMRMLScalarVolumeNode1;labelVolume:vtkMRMLLabelMapVolumeNode1;",
        )
    geometry = {"ijkToRASDirections": _numbers(directions.ravel()), "spacing": _numbers(grid.spacing),
                "origin": _numbers(TO_RAS @ grid.origin)}
    for number, (tag, kind, colours, file, title) in enumerate((
        ("Volume", "ScalarVolume", "vtkMRMLColorTableNodeGrey", image, name),
        ("LabelMapVolume", "LabelMapVolume", "vtkMRMLColorTableNodeFileGenericColors.txt", label, "annotation"),
    ), 1):
        storage, display = f"vtkMRMLVolumeArchetypeStorageNode{number}", f"vtkMRML{kind}DisplayNode1"
        ElementTree.SubElement(root, f"{tag}Display", id=display, name=f"{tag}Display", colorNodeID=colours)
        ElementTree.SubElement(root, "VolumeArchetypeStorage", id=storage, name=f"{tag}Storage", fileName=file)
        ElementTree.SubElement(root, tag, id=f"vtkMRML{kind}Node1", name=title, **geometry,
                               references=f"display:{display};storage:{storage};")
    return _document(root)


def itksnap_workspace(folder: Path, voxel: tuple[int, int, int], axis: int, image: str, label: str) -> bytes:
    """An ITK-SNAP workspace of the files ``image`` and ``label`` in ``folder``, in which it is to lie.

    A landmark at ``voxel`` marks the slice along array axis ``axis``. The workspace may be moved with its files.
    """
    centre = [n + 0.5 for n in voxel]  # voxel n lies between n and n + 1 there; the text is 10 mm off
    layers = {
        f"Layer[{number:03d}]": {"AbsolutePath": str(folder / file), "Role": role}
        for number, (file, role) in enumerate(((image, "MainRole"), (label, "SegmentationRole")))
    }
    landmark = {
        "Type": "LandmarkAnnotation", "Text": f"annotate this slice ({'xyz'[axis]} = {voxel[axis] + 1})",
        "Pos": _numbers(centre), "Offset": "10 10", "Plane": axis, "Color": "1 1 0", "Selected": 0,
        "VisibleInAllPlanes": 0, "VisibleInAllSlices": 0,
    }
    root = ElementTree.Element("registry")
    _registry(root, {
        "SaveLocation": str(folder), "Version": "20151215", "Layers": layers,
        "Annotations": {"Format": "ITK-SNAP Annotation File", "FormatDate": "20150624",
                        "Annotations": {"ArraySize": 1, "Element[0]": landmark}},
    })
    return _document(root)


def _registry(parent: ElementTree.Element, content: dict) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _registry(ElementTree.SubElement(parent, "folder", key=key), value)
        else:
            ElementTree.SubElement(parent, "entry", key=key, value=str(value))


def _numbers(values) -> str:
    return " ".join(format(float(value) + 0.0, ".12g") for value in values)  # + 0.0: no -0


def _document(root: ElementTree.Element) -> bytes:
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True) + b"\n"
